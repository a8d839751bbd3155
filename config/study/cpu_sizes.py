# Loss against the amount of text on two CPU cores, with a distilled student beside: 600 steps of 16 x 128
# tokens on 100,000 words of real text to 10 million, two small sizes, and a vocabulary of 4,096 so that
# most of the work is the model's. About an hour a seed and core with these two folders of pairs.
#   python prepare.py --input_dir=babylm --vocab_size=4096 --bos=line --data_dir=data/share_1.0
#   for share in 0.01 0.03 0.1; do python prepare.py --input_dir=babylm --bos=line \
#       --tokenizer=data/share_1.0/tokenizer.model --train_fraction=$share --data_dir=data/share_$share; done
#   python -m tools.study config/study/cpu_sizes.py --seeds=1,2 --test_loss \
#       --blimp=blimp_filtered,supplement_filtered
_model = "config/llama_16m.py config/cpu.py --n_layer=3 --n_head=4"
_small = f"{_model} --n_embd=96 --intermediate_size=288"
_large = f"{_model} --n_embd=160 --intermediate_size=480"
_shares = {"100k": 0.01, "300k": 0.03, "1M": 0.1, "10M": 1.0}
runs = [
    f"{name}-{words} {model} --data_dir=data/share_{share}"
    for name, model in (("small", _small), ("large", _large)) for words, share in _shares.items()]
runs += [
    f"taught-{words} {_small} --data_dir=data/share_{_shares[words]} --temperature=1 large-{words}"
    for words in ("300k", "10M")]
settings = ["--batch_size=16", "--max_iters=600", "--epochs=1000", "--eval_interval=100", "--eval_chunks=512"]
out_dir = "out/cpu_sizes"
