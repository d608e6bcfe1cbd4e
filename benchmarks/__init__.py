"""Commands that measure, each for a page of docs."""

import common  # noqa: F401  (before MuJoCo, which fails on a GL library that is missing)
