"""attnspec: long-context attention as a readable spec, a conformance suite and fast kernels.

`attnspec.reference` is the spec (NumPy only), `attnspec.conformance` certifies kernels against it,
`attnspec.fast` holds the kernels. Nothing is imported until it is asked for.
"""

__version__ = "0.1.0"
