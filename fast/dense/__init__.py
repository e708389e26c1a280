"""Dense attention: the mechanism that the others depart from."""
