"""The stages after pretraining: finetune, predict, suggest, distill, and the probe that judges a run as it goes.

In: a workspace, labels, starts. Out: predictions, curve tables, a saved model.
"""
