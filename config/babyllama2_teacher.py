# BabyLlama-2, a teacher (section 4): 345,355,200 parameters. Train one per seed.
# 9.5M words to train, 0.5M to validate; the official dev set is the test set:
#   python prepare.py --input_dir=babylm --data_dir=data/babylm_95 --val_fraction=0.05
#   for seed in 1 2; do torchrun --nproc_per_node=4 train.py config/babyllama2_teacher.py --seed=$seed \
#       --out_dir=out/babyllama2_teacher$seed; done
data_dir = "data/babylm_95"

arch = "llama"
n_layer = 32
n_head = 15
n_kv_head = 5
n_embd = 960
intermediate_size = 2560

epochs = 8
batch_size = 128
micro_batch_size = 32  # fits 24 GB: 64; 80 GB: 128 (tools/plan.py)
learning_rate = 7e-4
warmup_iters = 600
weight_decay = 5.0
seq_len = 128
