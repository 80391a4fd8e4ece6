"""`python -m boilermaker`, where the module is installed as a package."""

import sys

from boilermaker import main

sys.exit(main())
