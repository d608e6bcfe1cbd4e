"""LeRobot's side: its dataset format, written from corpora and read back, and its environment hub.

python -m common.lerobot export runs/*/corpus.hdf5 --out DIR
python -m common.lerobot import DIR --out FOLDER

lerobot itself is not needed here, and couldn't be: it wants an older torch.
"""
