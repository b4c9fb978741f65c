"""Friendly names. An alias pins timm's tag, and with it the class count: bare `tiny_vit_21m_224` has 21,841 classes."""

ALIASES = {
    "tinyvit-5m": "tiny_vit_5m_224.dist_in22k_ft_in1k",
    "tinyvit-11m": "tiny_vit_11m_224.dist_in22k_ft_in1k",
    "tinyvit-21m": "tiny_vit_21m_224.dist_in22k_ft_in1k",
    "deit-tiny": "deit_tiny_distilled_patch16_224.fb_in1k",
    "deit-small": "deit_small_distilled_patch16_224.fb_in1k",
    "deit-base": "deit_base_distilled_patch16_224.fb_in1k",
    "levit-128s": "levit_128s.fb_dist_in1k",
    "levit-128": "levit_128.fb_dist_in1k",
    "levit-192": "levit_192.fb_dist_in1k",
    "levit-256": "levit_256.fb_dist_in1k",
    "levit-384": "levit_384.fb_dist_in1k",
    "cait-xxs24": "cait_xxs24_224.fb_dist_in1k",
    "cait-xxs36": "cait_xxs36_224.fb_dist_in1k",
    "cait-s24": "cait_s24_224.fb_dist_in1k",
}
