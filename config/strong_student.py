# A recipe for students that beats the papers' on the same words (README), laid over a student's config:
#   python distill.py config/llama_58m.py config/strong_student.py --teachers=out/strong1,out/strong2
epochs = 10
learning_rate = 2e-3
optimizer = "muon"
weight_decay = 1.0
alpha = 0.5
temperature = 1.0
kl_reduction = "token"
