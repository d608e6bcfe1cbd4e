"""`python -m common.data FILE ...`: sum up demonstration files and corpora, or say what is wrong with them."""

import tyro

from common.cli import run_command
from common.data.hdf5 import main

if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
