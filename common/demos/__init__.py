"""The scripted demonstrator: several ways of doing any LIBERO task, whose names are known."""
