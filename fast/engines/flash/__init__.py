"""Tiled exact attention over a plan of visible keys, with its lse, forward and backward."""

from attnspec.fast.engines.flash.blocks import BlockLists
from attnspec.fast.engines.flash.configs import SPECIALISED_CONFIGS
from attnspec.fast.engines.flash.gradient import flash_backward
from attnspec.fast.engines.flash.masks import mask_options
from attnspec.fast.engines.flash.op import flash

__all__ = ["SPECIALISED_CONFIGS", "BlockLists", "flash", "flash_backward", "mask_options"]
