"The paper's instruction datasets as conversations: templates, converters, mixes."
from tulu_study.data.conversion import DatasetError, Report, convert, converter, converters, require_accepted

__all__ = ["DatasetError", "Report", "convert", "converter", "converters", "require_accepted"]
