"""The accuracy studies that `bench/accuracy.py` runs, one file a study."""
