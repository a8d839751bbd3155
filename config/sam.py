# One more epoch with sharpness-aware minimisation (Baby Llama, appendix B: after 15 plain epochs of
# GPT2-10M; no improvement there). The radius is the SAM paper's default; the learning rate of that epoch is
# our choice.
#   python train.py config/gpt2_10m.py config/sam.py --init_from=out/gpt2_10m --out_dir=out/gpt2_10m_sam
sam_rho = 0.05
epochs = 1
learning_rate = 5e-5
warmup_iters = 0
schedule = "linear"
