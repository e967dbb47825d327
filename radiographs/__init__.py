"""Radiographs as files: to pixels, to the size of the model, listed and split by patient."""
