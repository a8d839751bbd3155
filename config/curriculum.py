# Curriculum learning (Baby Llama, appendix B), laid over a model's config: five buckets of sources from
# easy to hard, 3 epochs over the first, then over the first two, and so on. Sources as in the 2023 data,
# whose children's corpus and encyclopaedias have these names; the last 3 epochs see all of it. The paper's
# GPT2-10M reached a validation loss of 3.75 against 3.74 without. The buckets follow the readability of
# the text (footnote 9): the second command prints a config like this one for any prepared text.
#   python train.py config/gpt2_10m.py config/curriculum.py --out_dir=out/curriculum
#   python prepare.py --readability=data/babylm --buckets=5
curriculum = [
    "aochildes", "open_subtitles", "switchboard cbt qed children_stories bnc_spoken",
    "simple_wikipedia gutenberg", "wikipedia"]
curriculum_epochs = 3
epochs = 15
