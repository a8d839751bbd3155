# Loss against the amount of text, two model sizes, on what `make demo` left in demo/ (BabyLlama-2, figure 3,
# in small):
#   make demo
#   for share in 0.125 0.25 0.5 1.0; do python prepare.py --input_dir=demo/text --bos=line \
#       --tokenizer=demo/data/tokenizer.model --train_fraction=$share --data_dir=demo/share_$share; done
#   python -m tools.study config/demo/sizes.py
#   python -m tools.plot --sizes=$(ls -d demo/sizes/*/ | paste -sd,) --out=sizes
# 300 steps each, far more than one pass over the smallest: the best checkpoint counts, as always.
runs = [
    f"{name}-{int(1000 * share)} config/demo/student.py --n_embd={width} --intermediate_size={3 * width} "
    f"--data_dir=demo/share_{share}"
    for name, width in (("small", 48), ("large", 96)) for share in (0.125, 0.25, 0.5, 1.0)]
settings = ["config/demo/demo.py", "--max_iters=300"]
out_dir = "demo/sizes"
