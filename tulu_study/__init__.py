"The Tülu paper (Wang et al. 2023) as a living, executable study. See `tulu_study.data`, `.training`, `.evaluation` and the command `tulu-study`."
__version__ = "0.1.0"
