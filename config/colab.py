# One small GPU for an evening, laid over a model's config (sizes for 15 GB of memory; its time was not
# measured). Colab's T4 does not multiply bfloat16, so that --dtype=auto takes float16 there, with the loss
# scaled; newer cards get bfloat16.
#   python train.py config/llama_16m.py config/colab.py --out_dir=out/llama_16m
#   python train.py config/gpt2_10m.py config/colab.py --out_dir=out/gpt2_10m
#   python distill.py config/llama_12m.py config/colab.py --teachers=out/gpt2_10m,out/llama_16m \
#       --temperature=1 --out_dir=out/student
batch_size = 32
micro_batch_size = 32
epochs = 4
max_iters = 8000
learning_rate = 1e-3
warmup_iters = 200
weight_decay = 0.1
eval_interval = 1000
eval_chunks = 2048
log_interval = 50
