# A recipe for teachers that beats the papers' on the same words (README), laid over a Llama's config:
#   python train.py config/llama_360m.py config/strong_teacher.py --seed=1 --out_dir=out/strong1
#   python train.py config/llama_360m.py config/strong_teacher.py --seed=2 --out_dir=out/strong2
learning_rate = 2e-3
optimizer = "muon"
weight_decay = 2.0
