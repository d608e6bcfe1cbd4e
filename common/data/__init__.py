"""Episodes on disk: LIBERO's HDF5 layout (`hdf5`), and samples of it for a VLA (`vla`)."""
