"""The cache on disk: numpy, zarr and pyarrow; knows nothing of models, opens without torch."""
