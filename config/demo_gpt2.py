# GPT-2 teacher of `make demo`.
arch = "gpt2"
n_layer = 4
n_head = 4
n_embd = 128
intermediate_size = 512
tie_weights = True
norm_eps = 1e-5
dropout = 0.1
