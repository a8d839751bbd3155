# Llama teacher of `make demo`, laid over config/demo/demo.py.
arch = "llama"
n_layer = 3
n_head = 4
n_embd = 96
intermediate_size = 288
dropout = 0.1
max_iters = 700
