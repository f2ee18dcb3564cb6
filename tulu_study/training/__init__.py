"Fine-tuning: encoding with the loss mask, tokenizers, the schedule, and the launcher of the trainer."
from .encoding import Encoded, encode, encode_all, encode_prompt_completion, show_mask
from .schedule import rate_factors, schedule, total_steps, warmup_steps
from .tokenizers import grow_embeddings, load_tokenizer
