"""python -m zs_lightning build-simulator-data: a model searches, a judge labels what it found."""
