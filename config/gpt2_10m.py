# GPT2-10M (Baby Llama, ablations): 10,480,128 parameters. Recipe: the GPT-2 teacher's, which the paper does
# not state for this model.
#   python train.py config/gpt2_10m.py --out_dir=out/gpt2_10m
arch = "gpt2"
n_layer = 8
n_head = 16
n_embd = 256
intermediate_size = 1024
tie_weights = True
norm_eps = 1e-5
dropout = 0.1

epochs = 6
batch_size = 256
micro_batch_size = 32  # fits 24 GB: 256 (tools/plan.py)
learning_rate = 2.5e-4
warmup_iters = 200
weight_decay = 0.0
seq_len = 128
