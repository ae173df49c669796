// Does not compile: the payload is not what the job type asks for.

import type { TypedJobInput } from "../gen/graphql/graphql.js";

export const JOB: TypedJobInput = {
  thumbnailCreate: { assetId: "a", versionNumber: "1" },
};
