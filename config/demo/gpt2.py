# GPT-2 teacher of `make demo`, laid over config/demo/demo.py. It learns more slowly than the Llama: a higher
# rate.
arch = "gpt2"
n_layer = 3
n_head = 4
n_embd = 96
intermediate_size = 384
tie_weights = True
norm_eps = 1e-5
dropout = 0.05
learning_rate = 3e-3
max_iters = 700
