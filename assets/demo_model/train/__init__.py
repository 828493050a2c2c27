"""How the demo model came to be: corpus generator, tokenizer, training, export.

python -m assets.demo_model.train.train --out DIR
"""
