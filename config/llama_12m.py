# Llama of 12,388,608 parameters: Llama-16M with half its layers, a student for CPUs (ours, no paper's).
#   python train.py config/llama_12m.py config/cpu.py --out_dir=out/llama_12m
arch = "llama"
n_layer = 4
n_head = 8
n_embd = 256
intermediate_size = 1024
