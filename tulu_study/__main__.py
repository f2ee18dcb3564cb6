"`python -m tulu_study COMMAND`, the same as `tulu-study COMMAND`."
from tulu_study.cli import main

main()
