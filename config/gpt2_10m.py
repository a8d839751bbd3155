# GPT2-10M (Baby Llama, ablations): 10,480,128 parameters.
#   python train.py config/gpt2_10m.py --out_dir=out/gpt2_10m
arch = "gpt2"
n_layer = 8
n_head = 16
n_embd = 256
intermediate_size = 1024
tie_weights = True
norm_eps = 1e-5
dropout = 0.1
