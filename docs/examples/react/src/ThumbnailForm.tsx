// Uploads a picture and enqueues its thumbnails. The messages at the fields come from the server.

import { useMutation } from "@apollo/client/react";
import { type FormEvent, useState } from "react";
import { graphql } from "./gen";
import { authorization } from "./login";

const ENQUEUE = graphql(`
  mutation Enqueue($thumbnail: ThumbnailCreateInput!, $priority: Int) {
    enqueue(job: { thumbnailCreate: $thumbnail }, options: { priority: $priority }) {
      __typename
      ... on EnqueueJobSuccess { job { id } }
      ... on PayloadInvalid { violations { path message } }
      ... on InputInvalid { violations { path message } }
      ... on Error { message }
    }
  }
`);

/** Messages by field. The key "" is for the form as a whole. */
type Faults = Record<string, string[]>;

export function ThumbnailForm() {
  const [enqueue] = useMutation(ENQUEUE, { refetchQueries: ["Jobs"] });
  // One id per choice of a picture: uploading the same picture again is not an error.
  const [picture, setPicture] = useState<{ file: File; assetId: string }>();
  const [sizes, setSizes] = useState("128, 512");
  const [priority, setPriority] = useState("50");
  const [faults, setFaults] = useState<Faults>({});
  const [isSending, setSending] = useState(false);

  async function send(): Promise<Faults> {
    if (!picture) return { picture: ["Choose a picture."] };
    const refused = await upload(picture.file, picture.assetId);
    if (refused) return { picture: [refused] };
    const { data } = await enqueue({
      variables: {
        thumbnail: { assetId: picture.assetId, versionNumber: 1, sizes: numbersOf(sizes) },
        priority: Number(priority),
      },
    });
    const result = data?.enqueue;
    switch (result?.__typename) {
      case "EnqueueJobSuccess":
        return {};
      case "PayloadInvalid":
      case "InputInvalid":
        return byField(result.violations);
      default:
        return { "": [result?.message ?? "The server did not answer."] };
    }
  }

  async function submit(event: FormEvent) {
    event.preventDefault();
    setSending(true);
    // Errors that the user cannot correct are exceptions: no connection, an expired token.
    setFaults(await send().catch((error: Error) => ({ "": [error.message] })));
    setSending(false);
  }

  return (
    <form onSubmit={submit}>
      <label>
        Picture
        <input
          type="file"
          accept="image/*"
          onChange={({ target }) => {
            const file = target.files?.[0];
            setPicture(file && { file, assetId: crypto.randomUUID() });
          }}
        />
        <Messages of={faults.picture} />
      </label>
      <label>
        Sizes
        <input value={sizes} onChange={({ target }) => setSizes(target.value)} />
        <Messages of={faults.sizes} />
      </label>
      <label>
        Priority
        <input
          type="number"
          value={priority}
          onChange={({ target }) => setPriority(target.value)}
        />
        <Messages of={faults.priority} />
      </label>
      <button disabled={isSending}>Create thumbnails</button>
      <Messages of={faults[""]} />
    </form>
  );
}

function Messages({ of = [] }: { of?: string[] | undefined }) {
  return of.map((message) => (
    <p role="alert" key={message}>
      {message}
    </p>
  ));
}

/** Groups violations by the first part of their path: that of the second size is `/sizes/1`. */
function byField(violations: { path: string; message: string }[]): Faults {
  const faults: Faults = {};
  for (const { path, message } of violations) (faults[path.split("/")[1] ?? ""] ??= []).push(message);
  return faults;
}

function numbersOf(text: string): number[] {
  return text.split(",").filter((each) => each.trim()).map(Number);
}

/** Uploads the picture. Returns the server's message if it is refused. */
async function upload(file: File, assetId: string): Promise<string | undefined> {
  const response = await fetch(`/assets/${assetId}/1`, {
    method: "POST",
    headers: { ...authorization(), "content-type": file.type },
    body: file,
  });
  if (!response.ok) return ((await response.json()) as { error: { message: string } }).error.message;
}
