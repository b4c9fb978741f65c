"""distill: knowledge-distillation pipelines for vision, on torch and timm."""

__version__ = "0.1.0"
