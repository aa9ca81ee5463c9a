"""histossl: continue self-supervised pretraining on a lab's own slides, and measure how many labels that saved."""

__version__ = "0.1.0"
