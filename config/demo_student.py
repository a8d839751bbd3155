# The student of `make demo`, trained with train.py (plain) and with distill.py.
arch = "llama"
n_layer = 4
n_head = 4
n_embd = 96
intermediate_size = 256
