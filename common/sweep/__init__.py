"""A script on many tasks: `python -m common.sweep gaussian_ppo.py --tasks libero_90`.

`jobs` starts, resumes and stops single runs, on this machine or on a Ray cluster; `report` sums up what they left; `__main__` is the
command. All state is in the runs' own folders: whatever is killed, the same command goes on.
"""
