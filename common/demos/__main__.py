"""`python -m common.demos --task TASK --out DIR`: see `common.demos.demonstrator`."""

from common.cli import run_command
from common.demos.demonstrator import main

if __name__ == "__main__":
    run_command(main)
