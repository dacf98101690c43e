"""Measures of quality and rate."""

from __future__ import annotations

from magvit_fast.metrics.best_of import MAGVIT_BEST, MASKVIT_BEST, TrialScores
from magvit_fast.metrics.codebook import codebook_counts, codebook_perplexity, codebook_usage
from magvit_fast.metrics.evaluation import Evaluation, Networks
from magvit_fast.metrics.features import (
    C3DLogits,
    ImageFeatures,
    VideoFeatures,
    load_network,
)
from magvit_fast.metrics.frechet import FeatureMoments, frechet_distance
from magvit_fast.metrics.inception import ClassStatistics, inception_score
from magvit_fast.metrics.lpips import Lpips, load_lpips
from magvit_fast.metrics.ms_ssim import ms_ssim
from magvit_fast.metrics.protocols import PROTOCOLS, Protocol, clip_requests, get_protocol
from magvit_fast.metrics.psnr import frame_psnr, psnr
from magvit_fast.metrics.rate import bits_per_pixel, entropy_coded_bits, fixed_length_bits
from magvit_fast.metrics.resize import central_crop, resize_bilinear
from magvit_fast.metrics.spread import spread
from magvit_fast.metrics.ssim import frame_ssim, ssim

__all__ = [
    "MAGVIT_BEST",
    "MASKVIT_BEST",
    "PROTOCOLS",
    "C3DLogits",
    "ClassStatistics",
    "Evaluation",
    "FeatureMoments",
    "ImageFeatures",
    "Lpips",
    "Networks",
    "Protocol",
    "TrialScores",
    "VideoFeatures",
    "bits_per_pixel",
    "central_crop",
    "clip_requests",
    "codebook_counts",
    "codebook_perplexity",
    "codebook_usage",
    "entropy_coded_bits",
    "fixed_length_bits",
    "frame_psnr",
    "frame_ssim",
    "frechet_distance",
    "get_protocol",
    "inception_score",
    "load_lpips",
    "load_network",
    "ms_ssim",
    "psnr",
    "resize_bilinear",
    "spread",
    "ssim",
]
