import { ApolloProvider } from "@apollo/client/react";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { client } from "./client";
import { Jobs } from "./Jobs";
import { ThumbnailForm } from "./ThumbnailForm";

createRoot(document.getElementById("root") as HTMLElement).render(
  <StrictMode>
    <ApolloProvider client={client}>
      <h1>Thumbnails</h1>
      <ThumbnailForm />
      <Jobs />
    </ApolloProvider>
  </StrictMode>,
);
