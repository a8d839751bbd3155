# A recipe that beats the papers' for a Llama without teachers, laid over its config. Two such, apart by seed,
# are better models than Baby Llama's teachers and no better as teachers (RESULTS.md).
#   python train.py config/llama_360m.py config/strong_teacher.py --out_dir=out/strong_teacher
learning_rate = 2e-3
optimizer = "muon"
weight_decay = 2.0
