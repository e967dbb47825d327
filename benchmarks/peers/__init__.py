"""Methods from elsewhere, one file each, with the contract of `protocol.py`."""
