# Llama-16M (Baby Llama, ablations): 16,584,960 parameters.
#   python train.py config/llama_16m.py
arch = "llama"
n_layer = 8
n_head = 8
n_embd = 256
intermediate_size = 1024
