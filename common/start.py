"""What a script imports first: Ctrl-C and SIGTERM amid its other imports, which take seconds, are one line, and code 130 or 143.

`common.cli.run_command` takes over when they are done. And torch's threads are told, before it is imported, not to wait at full speed:
two runs on two cores otherwise take six times as long as one, not twice.
"""

import os
import signal


def _leave(number: int, _) -> None:
    os.write(2, b"interrupted\n" if number == signal.SIGINT else b"terminated\n")
    os._exit(128 + number)


for _number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(_number) != signal.SIG_IGN:  # as nohup and a shell's & have it
        signal.signal(_number, _leave)

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # a few microseconds, of 300,000 by default; asleep at once they would be late
