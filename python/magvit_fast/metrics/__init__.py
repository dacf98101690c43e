"""Measures of quality and rate."""

from __future__ import annotations

from magvit_fast.metrics.codebook import codebook_counts, codebook_perplexity, codebook_usage
from magvit_fast.metrics.psnr import frame_psnr, psnr
from magvit_fast.metrics.rate import bits_per_pixel, entropy_coded_bits, fixed_length_bits
from magvit_fast.metrics.ssim import frame_ssim, ssim

__all__ = [
    "bits_per_pixel",
    "codebook_counts",
    "codebook_perplexity",
    "codebook_usage",
    "entropy_coded_bits",
    "fixed_length_bits",
    "frame_psnr",
    "frame_ssim",
    "psnr",
    "ssim",
]
