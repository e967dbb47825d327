"""Synthetic radiographs with lesions and exact masks: python -m phantoms.phantom."""
