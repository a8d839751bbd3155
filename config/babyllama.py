# Baby Llama (BabyLM 2023; Baby Llama, section 2 and Table 1): 58,343,936 parameters from two teachers.
#   torchrun --nproc_per_node=4 train.py config/gpt2_705m.py
#   torchrun --nproc_per_node=4 train.py config/llama_360m.py
#   torchrun --nproc_per_node=4 distill.py config/babyllama.py
# The paper's run took under 3 hours on one RTX 3090. Paper: learning rate 3e-4, as here; the published code:
# 2.5e-4, weight decay 0.1 (taken from there) and random offsets. Its figure 2; its figures 3 and 4 of models
# fine-tuned with config/glue/babyllama.py and msgs_babyllama.py:
#   python -m tools.plot --phenomena=out/babyllama,out/llama_58m,out/gpt2_705m,out/llama_360m
#   python -m tools.plot --tasks=out/glue_babyllama,out/glue_llama_58m
out_dir = "out/babyllama"

arch = "llama"
n_layer = 16
n_head = 8
n_embd = 512
intermediate_size = 1024

epochs = 6
batch_size = 32
learning_rate = 3e-4
warmup_iters = 200
weight_decay = 0.1
seq_len = 128

teachers = ["out/gpt2_705m", "out/llama_360m"]
alpha = 0.5
temperature = 2.0
kl_reduction = "sequence"  # the published code's; 'token' is the equation as it reads
