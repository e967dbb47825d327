"""Public data sets of the field by name: python -m radiographs.adapters NAME FOLDER writes a manifest.csv."""
