# Loss against the amount of text for two model sizes, after BabyLlama-2's figure 3 (16M and 345M, nested
# random subsets of 100M words, from 1M on); here of 10M words. The paper's: --track=100M, and other shares.
#   python prepare.py --input_dir=babylm --data_dir=data/babylm --bos=line
#   for share in 0.1 0.2 0.5; do python prepare.py --input_dir=babylm --bos=line \
#       --tokenizer=data/babylm/tokenizer.model --train_fraction=$share --data_dir=data/babylm_$share; done
#   python -m tools.study config/study/babyllama2_sizes.py --nproc_per_node=4
#   python -m tools.plot --sizes=$(ls -d out/sizes/*/ | paste -sd,) --out=sizes
# Nothing is tuned again for a size of text, as in the paper; it does not say with which recipe the 16M were
# trained: here with the larger's.
_large = "config/babyllama2_teacher.py"
_small = f"{_large} --n_layer=8 --n_head=8 --n_kv_head=8 --n_embd=256 --intermediate_size=1024"
_folders = {10: "babylm_0.1", 20: "babylm_0.2", 50: "babylm_0.5", 100: "babylm"}  # by share of the text, %
runs = [
    f"{name}-{share} {model} --data_dir=data/{folder}"
    for name, model in (("16M", _small), ("345M", _large)) for share, folder in _folders.items()]
out_dir = "out/sizes"
