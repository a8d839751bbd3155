# The curriculum of config/curriculum.py for the six sources of the 2024 data. The buckets are those that
# prepare.py --readability gave for other text of these six kinds.
#   python train.py config/gpt2_10m.py config/curriculum_2024.py --out_dir=out/curriculum
curriculum = ["childes", "open_subtitles", "switchboard bnc_spoken", "gutenberg", "simple_wiki"]
curriculum_epochs = 3
epochs = 15
