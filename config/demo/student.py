# The student of `make demo`, laid over config/demo/demo.py: with train.py the plain one, with distill.py the
# distilled one.
arch = "llama"
n_layer = 3
n_head = 4
n_embd = 64
intermediate_size = 192
