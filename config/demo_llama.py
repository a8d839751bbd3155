# Llama teacher of `make demo`.
arch = "llama"
n_layer = 4
n_head = 4
n_embd = 128
intermediate_size = 384
dropout = 0.1
