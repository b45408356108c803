"""`python -m tf_blockmomentum.launch`."""

import sys

from tf_blockmomentum.launch import main

sys.exit(main())
